# SPDX-License-Identifier: Apache-2.0
"""The whole R1 recipe on a laptop (arXiv 2501.12948, figure 2 and section 2).

Command:   r1jax train --config=configs/quickstart.py      (the same as: r1jax quickstart)
Hardware:  2 CPU cores, 3 GiB of memory; about 9 minutes, compilation included
Expected:  held-out pass@1 about 40 % after the cold start, 84 to 92 % after rl_1, 91 to 93 %
           after rl_2, students 91 to 96 %; seed by seed in
           experiments/log/001_quickstart_what_it_takes_to_learn.md
"""

from r1jax.config import quickstart, to_config_dict


def get_config():
    """The quickstart recipe, every field open to the command line."""
    return to_config_dict(quickstart())
