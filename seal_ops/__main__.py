"""``python -m seal_ops`` is the command ``seal``."""

import sys

from .cli.main import main

sys.exit(main())
