"""``python -m svdiff``, which launchers of several processes can start: ``accelerate launch -m svdiff train ...``."""

import sys

from .cli import main

sys.exit(main())
