"""What `svdiff.train` is made of.

`config` holds the settings; `concepts`, `data`, `prior` and `retrieval` find the pictures; `families` is what differs
between kinds of pipelines; `noising` is what a denoiser is asked; `sources`, `cutmix`, `unmix`, `resizing` and
`dreambooth` make batches and their loss; `methods` is what trains; `optimizers`, `loop`, `graphs` and `state` take the
steps, and go on after a stop; `chance` is where randomness comes from; `hub` shares what came of it.
"""
