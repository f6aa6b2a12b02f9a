"""An audit as one HTML page: no script, nothing from elsewhere, everything from outside escaped."""

import json
from collections.abc import Callable
from functools import partial

from churn_kernels.audit import figures, text
from churn_kernels.audit.advice import GLOSSARY, advice
from churn_kernels.audit.amplify import Amplification
from churn_kernels.audit.attribute import LEVEL, Attribution
from churn_kernels.audit.blame import seen_from_here
from churn_kernels.audit.examine import Examination
from churn_kernels.audit.manifest import manifest_hash
from churn_kernels.audit.operators import Finding
from churn_kernels.audit.svg import escape

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #fff; --ink: #1c1f24; --muted: #5d6570; --grid: #dfe2e6;
  --accent: #1d4ed8; --bad: #b3261e; --after: #e0913a; --same: #c3c9d1; --good: #0f6b3c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --card: #1c1f25; --ink: #e9ebee; --muted: #a2a9b4; --grid: #343a44;
    --accent: #6ea2ff; --bad: #ff9d92; --after: #d98a35; --same: #4a525e; --good: #6fd39b;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 10px; overflow-wrap: anywhere; }
h1.differ { color: var(--bad); }
h1.same { color: var(--good); }
h2 { font-size: 19px; margin: 0 0 4px; }
p { margin: 0 0 10px; max-width: 90ch; }
.lead, .note { color: var(--muted); }
.note { font-size: 14.5px; }
section { background: var(--card); border: 1px solid var(--grid); border-radius: 12px;
  padding: 22px 24px; margin: 20px 0 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 8px 0;
  font-size: 14.5px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: 13.5px/1.5 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
figure { margin: 16px 0 0; }
figcaption { font-size: 14.5px; color: var(--muted); }
svg { display: block; width: 100%; height: auto; font-size: 13px; }
.narrow { display: none; max-width: 460px; }
ul { margin: 8px 0 0; padding-left: 20px; }
li { margin: 0 0 8px; max-width: 90ch; overflow-wrap: anywhere; }
text { fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
text.muted { fill: var(--muted); }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.line.grid { stroke: var(--grid); stroke-width: 1; }
.line.axis { stroke: var(--muted); stroke-width: 1; }
.line.mark { stroke: var(--bad); stroke-width: 1.2; stroke-dasharray: 4 3; }
.line.accent { stroke: var(--accent); }
.line.plain { stroke: var(--after); }
.line.interval { stroke: var(--accent); stroke-width: 3; opacity: .55; }
.line.interval.chance { stroke: var(--muted); stroke-width: 1.4; stroke-dasharray: 2 4;
  opacity: 1; }
rect.accent, circle.accent { fill: var(--accent); }
circle.accent.chance { fill: var(--card); stroke: var(--muted); stroke-width: 1.6; }
rect.same { fill: var(--same); }
rect.first { fill: var(--bad); }
rect.after { fill: var(--after); }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin: 0 6px 0 14px;
  vertical-align: -1px; }
.key.accent { background: var(--accent); } .key.same { background: var(--same); }
.key.first { background: var(--bad); } .key.after { background: var(--after); }
.key:first-child { margin-left: 0; }
@media (max-width: 760px) {
  main { padding: 24px 12px; } section { padding: 16px 14px; } h1 { font-size: 22px; }
  .wide { display: none; } .narrow { display: block; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; } dd { margin-bottom: 8px; }
}
@media print { .wide { display: block; } .narrow { display: none; }
  :root { --page: #fff; } main { padding: 0; max-width: none; }
  section { break-inside: avoid; } * { print-color-adjust: exact; } }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(found: Examination, target: str) -> str:
    """The page of an audit.

    Args:
        found: what `examine` found.
        target: what it is called; any text.
    """
    same = found.verdict == "none"
    body = [
        f'<h1 class="{"same" if same else "differ"}">{escape(_sentence(text.verdict(found)))}</h1>',
        f'<p class="lead"><code>{escape(target)}</code> on {escape(found.device)}. '
        f"{escape(text.of_pairs(found))}.</p>",
        _what_to_do(found),
        _where(found),
        _why(found.attribution, found.stopped),
        _growth(found.amplification, found),
        _stress(found),
        _ran_on(found),
        _section("Words", "What they mean on this page.", _named_all(GLOSSARY)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Audit of {escape(target)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body><main>\n{''.join(body)}\n</main></body>\n</html>\n"
    )


def _what_to_do(found: Examination) -> str:
    said = "".join(f"<li>{escape(one)}</li>" for one in advice(found))
    stopped = {part: escape(why) for part, why in found.stopped.items()}
    return _section(
        "What to do now",
        "Which switch or flag, and what it costs, by what was measured here.",
        f"<ul>{said}</ul>",
        f'<p class="note">Stopped early:</p>{_named_all(stopped)}' if stopped else "",
    )


def _where(found: Examination) -> str:
    finding, several = found.finding, len(found.operators) > 1
    return _section(
        "Where: the step, operator by operator",
        f"{finding.replays} replays of step {found.step} from one state, with a hash of every "
        f"tensor that goes into an operator or comes out of it.",
        *(_operation(finding) if finding.operation else ()),
        _named_all({"operators that race": escape(", ".join(found.operators))} if several else {}),
        _figure(
            partial(figures.timeline, finding),
            _key("same", "same bits")
            + _key("first", "first difference")
            + _key("after", "after it"),
        ),
        *(
            _figure(
                partial(figures.ulps, one), f"Output {number}: {escape(text.of_differences(one))}."
            )
            for number, one in enumerate(finding.outputs)
            if one and one.ulps
        ),
    )


def _operation(finding: Finding) -> list[str]:
    one = finding.operation
    assert one is not None
    facts = {
        "operator": one.name,
        "place": f"{finding.index + 1} of {len(finding.log)} operations",
        "module": one.module or "none",
        "phase": one.phase or "outside of the model",
        "source": seen_from_here(one.source) or "unknown",
        "tensors": one.tensors,
    }
    return [_named_all({name: f"<code>{escape(fact)}</code>" for name, fact in facts.items()})]


def _why(found: Attribution | None, stopped: dict[str, str]) -> str:
    if found is None:
        part = "shares of the causes"
        nothing = "nothing parts, as it is or under stress: there is no share to take."
        return _section("Why", f"stopped: {stopped[part]}." if part in stopped else nothing)
    skipped = {name: escape(why) for name, why in found.skipped.items()}
    shares = found.shares
    return _section(
        "Why: what a deterministic twin of each suspect removes",
        text.of_attribution(found) + ".",
        _figure(
            partial(figures.shares, shares),
            f"Share of the mean squared distance, with its {LEVEL:.0%} interval by permutation of "
            "the pairs. Hollow and dashed: it holds 0, so that chance may be all of it.",
        )
        if shares
        else "",
        _named_all({one.suspect: escape(text.of_share(one)) for one in shares}),
        f"<p class='note'>Skipped:</p>{_named_all(skipped)}" if skipped else "",
    )


def _growth(amplified: Amplification | None, found: Examination) -> str:
    title = "What becomes of it: one unit in the last place"
    if amplified is None:
        why = found.stopped.get("flips of one unit in the last place", "")
        return _section(title, f"stopped: {why}.")
    flipped = amplified.pairs
    key = _key("accent", "one flip each") + _key("after", "pairs as they are, where they part")
    return _section(
        title,
        text.of_amplification(amplified) + ".",
        _figure(partial(figures.amplification, flipped, found.pairs), key),
    )


def _stress(found: Examination) -> str:
    axes = {axis.name: escape(text.of_axis(axis)) for axis in found.axes}
    return _section(
        "Under stress",
        f"Step {found.step} with and without each, and the first step with its batch in parts; the "
        f"operators that race are pinned.",
        _named_all(axes),
    )


def _ran_on(found: Examination) -> str:
    facts = {
        name: f"<code>{escape(value if isinstance(value, str) else json.dumps(value))}</code>"
        for name, value in found.manifest.items()
    }
    return _section(
        "What it ran on",
        f"Two machines whose manifests hash to these 16 bytes differ in none of it: "
        f"{manifest_hash(found.manifest)}",
        _named_all(facts),
    )


def _section(title: str, note: str, *parts: str) -> str:
    note, inside = _sentence(note), "".join(parts)
    return (
        f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{inside}</section>\n'
    )


def _sentence(clause: str) -> str:
    return clause[:1].upper() + clause[1:]


def _figure(draw: Callable[[int], str], caption: str) -> str:
    """A drawing for wide screens and one for narrow ones, of which the style shows one."""
    return (
        f'<figure><div class="wide">{draw(figures.WIDE)}</div>'
        f'<div class="narrow">{draw(figures.NARROW)}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _key(kind: str, meaning: str) -> str:
    return f'<span class="key {kind}"></span>{escape(meaning)}'


def _named_all(values: dict[str, str]) -> str:
    """A list of names and values, which are HTML already."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in values.items())
    return f"<dl>{items}</dl>" if items else ""
