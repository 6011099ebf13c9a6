"""Options of commands that may run for a night: what is run when they end. Imports no jax."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EndOptions:
    """Shell commands for the end of a run."""

    when_done: str = ""
    """A shell command to run once the run has ended, well or badly (`sudo shutdown -h now`). $UFBERT_EXIT_CODE is the exit
    status, 0 if all went well and 128 + its number after a signal, and $UFBERT_RUN the folder. It runs after any end but an
    error before the work begins (an option, a file that is missing: a person is still there), a second Ctrl-C, and a kill that
    no process survives (SIGKILL, out of memory, power). Give it again with --resume: a command that a folder names is never
    run."""
    when_finished: str = ""
    """The same only for a run that has ended well; it runs before --when-done."""
    when_failed: str = ""
    """The same only for a run that has not: an error, a signal, a crash."""

    def last_commands(self, exit_code: int) -> list[str]:
        """Return the commands to run after this exit status, in order."""
        commands = [self.when_failed if exit_code else self.when_finished, self.when_done]
        return [command for command in commands if command]
