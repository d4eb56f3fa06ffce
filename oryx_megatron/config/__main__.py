"""`python -m oryx_megatron.config`: print the reference of all fields, which is docs/configuration.md."""

import sys

from oryx_megatron.config.reference import reference

if __name__ == "__main__":
    sys.stdout.write(reference())
