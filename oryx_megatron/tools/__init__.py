"""The commands of tools/ as modules: `python -m oryx_megatron.tools.generate`.

A wheel has them here; in a checkout they are found in tools/ of the repository.
"""

from oryx_megatron.resources import folder

if (_beside := str(folder("tools"))) not in __path__:
    __path__.append(_beside)
