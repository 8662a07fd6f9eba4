# SPDX-License-Identifier: Apache-2.0
"""R1's recipe on a search that cannot be guessed: three numbers, a target (arXiv 2501.12948, 2.2).

A try is right one time in ten, so an answer is as good as the number of tries it takes, and RL
finds that: reflection and length rise, as in figure 3 of the paper. The cold start is surer than
the quickstart's (every try is judged, a third of the wrong ones is tried again), because RL gives
up retrying where verdicts cannot be trusted or longer answers lose their form.

Command:   r1jax train --config=configs/countdown_laptop.py --out runs/countdown
Hardware:  2 CPU cores, 3 GiB of memory; 13 minutes beside other work, compilation included
Expected:  in rl_1 the share of answers with `wait` rises from 27 to 75 %, mean length from 41 to 67
           tokens; figures and controls in experiments/log/004_controls_of_the_quickstart.md
"""

import dataclasses

from r1jax.config import quickstart, to_config_dict


def get_config():
    """The quickstart recipe on countdown, every field open to the command line."""
    change, cfg = dataclasses.replace, quickstart()
    difficulty = change(
        cfg.tasks.difficulty, countdown_numbers=(3,), countdown_largest=5, countdown_target=30
    )
    tasks = change(
        cfg.tasks,
        names=("countdown",),
        difficulty=difficulty,
        mix=change(cfg.tasks.mix, checked=1.0, retry=0.3, max_tries=4),
    )
    reward = change(cfg.rl_1.reward, format=0.05)
    return to_config_dict(
        change(
            cfg,
            tasks=tasks,
            sampling=change(cfg.sampling, max_new_tokens=112),
            pretrain=change(cfg.pretrain, steps=2000, examples=64_000),
            cold_start=change(cfg.cold_start, steps=500, examples=16_000),
            rl_1=change(cfg.rl_1, steps=60, reward=reward),
            rl_2=change(cfg.rl_2, reward=reward),
        )
    )
