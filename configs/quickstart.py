# SPDX-License-Identifier: Apache-2.0
"""The whole R1 recipe on a laptop (arXiv 2501.12948, figure 2 and section 2).

Command:   r1jax train --config=configs/quickstart.py      (the same as: r1jax quickstart)
Hardware:  2 CPU cores, 2 GiB of memory
"""

from r1jax.config import quickstart, to_config_dict


def get_config():
    """The quickstart recipe, every field open to the command line."""
    return to_config_dict(quickstart())
