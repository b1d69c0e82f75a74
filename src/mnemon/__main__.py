"""`python -m mnemon`: the same as the `mnemon` command."""

from mnemon.cli.app import leave, main

leave(main())
