"""`python -m mnemon`: the same as the `mnemon` command."""

import sys

from mnemon.cli.app import main

sys.exit(main())
