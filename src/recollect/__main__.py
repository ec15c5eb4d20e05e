"""``python -m recollect`` is the ``recollect`` command."""

import sys

from recollect.cli import main

sys.exit(main())
