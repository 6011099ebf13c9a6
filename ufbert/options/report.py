"""Options of `ufbert report`. Imports no jax."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional

from ufbert.errors import UserError


@dataclass(frozen=True)
class ReportOptions:
    """Draw the page of a run as it stands, whether it is finished, at work or dead, and of several runs over each other."""

    folders: Annotated[tuple[str, ...], Positional] = ()
    """A run folder, or several, whose losses are then drawn over each other, against tokens and against time. One study
    (`ufbert study`), comparison (`ufbert compare`), sweep (`ufbert finetune`) or compression (`ufbert compress`) may stand
    instead, or the results.json of a comparison alone, under any name. Several comparisons of one protocol, such as halves that
    two machines have run, are joined: models and seeds are united."""
    out: str = ""
    """File to write, such as page.html; by default report.html in the folder, or NAME.html beside NAME.json. Several runs or
    comparisons need it; the results of joined comparisons are written beside it, in page.json."""

    def __post_init__(self) -> None:
        if not self.folders:
            raise UserError("A report needs a run folder, such as `ufbert report runs/mine`.")
        if len(self.folders) > 1 and not self.out:
            raise UserError("A page of several needs --out FILE: it belongs to none of their folders.")
        if len(set(self.folders)) < len(self.folders):
            raise UserError("A run is named twice.")
