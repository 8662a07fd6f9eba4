# SPDX-License-Identifier: Apache-2.0
"""What runs on the other side of the fence: never imported by the trainer, no dependencies.

`r1jax.rl.rewards.sandbox` starts `warden.main` as a process of its own (`python -I -S`). The warden
forks, for each run, a supervisor, a program (the untrusted text) and perhaps a checker (the tests).
"""
