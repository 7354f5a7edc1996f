"""``series.md``: groups, their differences from a baseline, and tuned candidates, as tables."""

from collections import Counter
from collections.abc import Iterator, Sequence

from ..runs.experiments import mean_and_deviation
from ..runs.paired import LEVEL, Comparison, Difference, Interval
from ..runs.ranking import spell_difference
from ..utils.quoting import markdown_text
from .series_groups import Family, Group, Study, differing_keys, labels, settings_of
from .series_record import SeriesRecord

_PERCENT = f"{LEVEL:.0%}".replace("%", " %")


def markdown(study: Study, records: Sequence[SeriesRecord]) -> str:
    """Return the tables of a study of some series."""
    sections = [_head(study, records), _groups_table(study)]
    if any(len(family.groups) > 1 for family in study.families):
        sections.append(_candidates(study))
    if study.asked:
        sections += [_notes(study), *_difference_tables(study)]
    sections += [*_unfinished(records), *_without_log(records), _machines(records)]
    return "\n".join(sections)


def spell_interval(interval: Interval) -> str:
    """Return ``[+0.003, +0.021]``."""
    return f"[{interval.low:+z.3f}, {interval.high:+z.3f}]"


def _head(study: Study, records: Sequence[SeriesRecord]) -> str:
    runs = sum(len(group.runs) for group in study.groups)
    names = ", ".join(markdown_text(record.name) for record in records)
    lines = [
        f"# Runs of {names}",
        "",
        f"{runs} runs of {len(study.groups)} groups, ordered by {study.criterion}. Scores: on dev, "
        "of the best epoch of each run, of the tasks that it trains; mean ± standard deviation "
        "over seeds. Conflict rate: the share of pairs of tasks whose gradients point apart "
        "(their cosine is negative). Cosine with sum: of the combined gradient with the plain sum "
        "of the task gradients; how far it is from 1 is how far the method turns the update.",
    ]
    if any(len(group.runs) == 1 for group in study.groups):
        lines += ["", "A group of one seed has no deviation and no interval."]
    return "\n".join(lines) + "\n"


def _groups_table(study: Study) -> str:
    points = {group.key: settings_of(group) for group in study.groups}
    keys = list(dict.fromkeys([*differing_keys(points.values()), *study.tuned]))
    recipes = _recipes(study.groups)
    head = [f"{study.criterion.score}, difference"] if study.asked else []
    rows = [
        [
            markdown_text(recipes[group.key]),
            *(markdown_text(points[group.key].get(key, "")) for key in keys),
            str(len(group.runs)),
            *(_mean(list(group.scores(score).values())) for score in study.scores),
            *([difference_cell(study, group)] if study.asked else []),
            _mean(group.conflict_rates),
            _mean(group.sum_cosines),
            f"{group.minutes:.1f}",
        ]
        for group in study.groups
    ]
    names = map(markdown_text, [*keys, "seeds", *study.scores, *head])
    return _table(["run", *names, "conflict rate", "cosine with sum", "minutes"], rows)


def _recipes(groups: Sequence[Group]) -> dict[str, str]:
    """Return the recipes of groups, with the series where several have the recipe."""
    series: dict[str, set[str]] = {}
    for group in groups:
        series.setdefault(group.recipe, set()).add(group.series)
    return {
        group.key: f"{group.series}/{group.recipe}"
        if len(series[group.recipe]) > 1
        else group.recipe
        for group in groups
    }


def difference_cell(study: Study, group: Group) -> str:
    """Return ``**+0.012** [+0.003, +0.021]``, the interval being simultaneous."""
    if study.is_baseline(group):
        return "baseline"
    score = study.criterion.score
    found = study.difference(group, score)
    if found is None:
        return "" if not group.scores(score) else "no common seed"
    return _with_interval(found, _seeds_of_baseline(study, group))


def _with_interval(found: Difference, seeds: int) -> str:
    if found.deviation is None:
        return f"{found.mean:+z.3f} (1 seed)"
    if found.simultaneous is None:
        return f"{found.mean:+z.3f} (no interval)"
    fewer = f" ({len(found.seeds)} of {seeds} seeds)" if len(found.seeds) < seeds else ""
    interval = found.simultaneous
    text = f"{_bold(f'{found.mean:+z.3f}', interval)} {spell_interval(interval)}"
    return text + fewer


def _seeds_of_baseline(study: Study, group: Group) -> int:
    (seeds,) = [len(g.runs) for g in study.groups if g.key == study.baselines[group.key]]
    return seeds


def _bold(text: str, interval: Interval) -> str:
    return f"**{text}**" if interval.excludes_zero else text


def _notes(study: Study) -> str:
    return (
        f"## Differences from {markdown_text(study.asked)}\n\n"
        "Each is of scores of the same seed: mean ± standard deviation, and of how many seeds. The "
        f"first interval is that of one difference by itself (t, {_PERCENT}); the second ones of a "
        f"table hold all together at {_PERCENT} (Bonferroni; their standard error is from the "
        "residuals of score = group + seed, over all groups that have every seed of the "
        "baseline). **Bold**: the interval excludes 0.\n"
    )


def _difference_tables(study: Study) -> Iterator[str]:
    names = labels(study.groups)
    for score in sorted(study.scores, key=study.criterion.score.__ne__):
        for baseline, comparison in study.compared[score].items():
            rows = [
                [markdown_text(names[group.key]), *_difference_row(found)]
                for group in study.groups
                if (found := comparison.differences.get(group.key)) is not None
            ]
            if not rows:
                continue
            title = f"### {markdown_text(score)}, from {markdown_text(names[baseline])}"
            columns = ["group", "difference", "by itself", "together"]
            yield f"{title}\n\n{_layout(comparison)}\n\n{_table(columns, rows)}"


def _difference_row(found: Difference) -> list[str]:
    intervals = (found.alone, found.simultaneous)
    return [
        spell_difference(found),
        *("" if one is None else _bold(spell_interval(one), one) for one in intervals),
    ]


def _layout(comparison: Comparison) -> str:
    layout = comparison.layout
    if layout is None:
        return (
            "No intervals together: these take two seeds of the baseline, and another group that "
            "has all of them."
        )
    count = comparison.comparisons
    several = "s" if count > 1 else ""
    return (
        f"{count} comparison{several}; residuals of {len(layout.groups)} groups and "
        f"{len(layout.seeds)} seeds: standard deviation {layout.variance**0.5:.4f}, "
        f"{layout.freedom} degrees of freedom."
    )


def _candidates(study: Study) -> str:
    """Return the table of the values that were tried of tuned settings."""
    families = [family for family in study.families if len(family.groups) > 1]
    tuned = [_tuned_part(group) for family in families for group in family.groups]
    values = list(dict.fromkeys(tuned))
    names, rows = labels(study.groups), []
    for family in families:
        own = {_tuned_part(group): _decision(family, group) for group in family.groups}
        name = markdown_text(names[family.chosen])
        rows.append([name, *(own.get(value, "") for value in values)])
    title = (
        f"## Candidates\n\nThe score that decides, at the first seed, by {', '.join(study.tuned)}; "
        "**bold** is the best, whose group is shown above. That seed is among those averaged, so "
        "that the choice favours the chosen, all groups alike.\n\n"
    )
    return title + _table(["group", *map(markdown_text, values)], rows)


def _tuned_part(group: Group) -> str:
    return ", ".join(setting for setting in group.point if setting not in group.family)


def _decision(family: Family, group: Group) -> str:
    value = family.decisions[group.key]
    if value is None:
        return "no result"
    return f"**{value:.3f}**" if group.key == family.chosen else f"{value:.3f}"


def _unfinished(records: Sequence[SeriesRecord]) -> Iterator[str]:
    lines = [
        f"- {markdown_text(f'{record.name}: {run.name}')}, after {run.steps} steps"
        + (", the last of them skipped, since gradients were not finite" if run.skipped else "")
        for record in records
        for run in record.unfinished
    ]
    if lines:
        title = "## No result\n\nThese diverged, did not fit in memory, or are not done yet:\n"
        yield "\n".join([title, *lines]) + "\n"


def _without_log(records: Sequence[SeriesRecord]) -> Iterator[str]:
    lines = [
        f"- {markdown_text(f'{record.name}: {line}')}"
        for record in records
        for line in record.without_log
    ]
    if lines:
        yield "\n".join(["## Without steps and conflicts\n", *lines]) + "\n"


def _machines(records: Sequence[SeriesRecord]) -> str:
    lines = ["## Read with", ""]
    for record in records:
        counts = Counter(f"{run.read_with}; precision {run.precision}" for run in record.runs)
        for machine, count in counts.items():
            line = f"{record.name}, {count} run{'s' if count > 1 else ''}: {machine}"
            lines.append(f"- {markdown_text(line)}")
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float]) -> str:
    return mean_and_deviation(values) if values else ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
