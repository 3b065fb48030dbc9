"""Measurements against what users would pick instead; `svdiff bench` runs them, results/ keeps them."""
