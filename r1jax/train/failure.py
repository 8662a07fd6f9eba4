# SPDX-License-Identifier: Apache-2.0
"""The way a program says that it cannot go on, where no fault of the program is the cause."""


class Preempted(KeyboardInterrupt):
    """SIGTERM: the machine is wanted back. What had to be saved is saved."""


class StageFailed(RuntimeError):
    """A stage came to an end that the next one cannot start from.

    Its message is one line: the stage, what happened, and the config field to change. No traceback
    would add to it.
    """
