"""The study: SVDiff beside what it is compared with, on the miniature, judged by its recogniser and its encoder.

`python -m benchmarks.study` makes what is missing and writes docs/study.md. One file an experiment (`subjects.py`,
`styles.py`, ...) says what is run and how it is judged; `contenders.py` who takes part, `runs.py` runs them and keeps
what they found, `page.py` and `plots.py` tell it.
"""
