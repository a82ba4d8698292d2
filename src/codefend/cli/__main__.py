"""``python -m codefend.cli``."""

import sys

from codefend.cli.app import main

sys.exit(main())
