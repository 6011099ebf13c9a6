"""`ufbert report`: the page of any folder that has one, at any time."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ufbert.compare.collect import comparison_results
from ufbert.compare.joined import joined
from ufbert.compare.page import page_of
from ufbert.compare.protocol import COMPARISON_FILE, read_comparison
from ufbert.compare.results import Comparison
from ufbert.compare.results import read_results as read_comparison_results
from ufbert.compress import report as compression
from ufbert.errors import UserError
from ufbert.glue.report import glue_page
from ufbert.glue.results import read_results
from ufbert.options.report import ReportOptions
from ufbert.report.overlay import overlay_page
from ufbert.report.page import Page, html
from ufbert.report.run_records import RunRecords, read_records_of
from ufbert.report.run_report import run_page
from ufbert.runtime.files import write_json, write_text
from ufbert.runtime.run_folder import CONFIG_FILE
from ufbert.runtime.typed import Header, read_typed
from ufbert.study.cells import CELL_FILE, STUDY_FILE, read_study
from ufbert.study.report import study_page
from ufbert.study.results import results_of


def report(options: ReportOptions) -> Path:
    """Draw the page of a folder, or of several runs, and return its path. Raises UserError for a folder that has no page."""
    folders = [Path(folder) for folder in options.folders]
    path = Path(options.out) if options.out else _beside(folders[0])
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; name a file, such as {path / 'report.html'}.")
    if len(folders) > 1 and any(map(_is_comparison, folders)):
        page = page_of(_join(folders, path.with_suffix(".json")))
    else:
        page = overlay_page([_run(folder) for folder in folders]) if len(folders) > 1 else _page(folders[0])
    write_text(path, html(page))
    print(f"report {path}")
    return path


def _is_comparison(place: Path) -> bool:
    return place.is_file() or (place / COMPARISON_FILE).is_file()


def _join(places: list[Path], path: Path) -> Comparison:
    """Join several comparisons, and write the results of that to `path`, which must be new."""
    for place in places:
        if not place.exists():
            raise _no_page(place)
        if not _is_comparison(place):
            raise UserError(f"{place} is no comparison, and only comparisons are joined with one.")
    if path.exists():
        raise UserError(f"{path} exists, and would hold the joined results; take another --out.")
    results = joined({str(place): _comparison(place) for place in places})
    write_json(path, asdict(results))
    print(f"results {path}")
    return results


def _comparison(place: Path) -> Comparison:
    """Read a comparison from its cells, or from its results.json alone."""
    return read_comparison_results(place) if place.is_file() else comparison_results(place, read_comparison(place))


def _beside(place: Path) -> Path:
    return place.with_suffix(".html") if place.is_file() else _inner(place) / "report.html"


def _page(folder: Path) -> Page:
    """Return the page of a folder, by the file that it holds, or of a comparison's results.json alone."""
    if folder.is_file():
        return page_of(_comparison(folder))
    for file, draw in PAGES.items():
        if (_inner(folder) / file).is_file():
            return draw(_inner(folder))
    raise _no_page(folder)


def _inner(folder: Path) -> Path:
    """Return the run folder within a cell of a study, or the folder itself."""
    return folder / "run" if (folder / CELL_FILE).is_file() else folder


def _run(folder: Path) -> RunRecords:
    """Read a run. Raises UserError if the folder is no run's, or if nothing has been measured yet."""
    inner = _inner(folder)
    if not (inner / CONFIG_FILE).is_file():
        kind = next((name for file, name in KINDS.items() if (inner / file).is_file()), None)
        raise UserError(f"{folder} is {kind}; only runs are drawn over each other.") if kind else _no_page(folder)
    run = read_records_of(inner)
    if not run.steps and not run.evaluations:
        damaged = f" Damaged lines of its metrics.jsonl: {run.damaged:,}." if run.damaged else ""
        raise UserError(f"The run in {folder} has no metrics yet, so there is nothing to draw.{damaged}")
    return run


def _no_page(folder: Path) -> UserError:
    if not folder.is_dir():
        return UserError(f"There is no folder {folder}.")
    return UserError(
        f"{folder} is not a run folder; nor is it a comparison, a study, a compression, or a sweep of "
        "`ufbert finetune`."
    )


def _study_page(folder: Path) -> Page:
    return study_page(results_of(folder, read_study(folder)))


def _comparison_page(folder: Path) -> Page:
    return page_of(_comparison(folder))


def _begun_page(folder: Path) -> Page:
    if read_typed(folder / CONFIG_FILE, Header).format == compression.RUN_FORMAT:
        return compression.page_of(folder)
    return run_page(_run(folder))


PAGES: dict[str, Callable[[Path], Page]] = {
    COMPARISON_FILE: _comparison_page,
    STUDY_FILE: _study_page,
    "glue.json": lambda folder: glue_page(read_results(folder), folder),
    compression.RESULTS_FILE: compression.page_of,
    CONFIG_FILE: _begun_page,
}
"""Who draws the page of a folder that holds this file; the first that is there counts."""
KINDS = {
    COMPARISON_FILE: "a comparison",
    STUDY_FILE: "a study",
    "glue.json": "a sweep",
    compression.RESULTS_FILE: "a compression",
}
