FILE_NAME = "pytorch_custom_diffusion_weights.safetensors"
