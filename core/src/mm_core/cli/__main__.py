"""`python -m mm_core.cli`: the `mm` command where its script is not on the path."""

import sys

from mm_core.cli.main import main

sys.exit(main())
