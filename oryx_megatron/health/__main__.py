"""`python -m oryx_megatron.health`."""

import sys

from oryx_megatron.health import main

sys.exit(main())
