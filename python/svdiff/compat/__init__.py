"""Stand-ins for other packages: a script written for one of them runs here with its import line changed."""
