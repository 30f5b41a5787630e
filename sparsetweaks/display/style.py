"""The look of an overview in a notebook: every rule is below one class, nothing comes from elsewhere."""

from __future__ import annotations

ROOT = "sparsetweaks-overview"

_LIGHT = {
    "ink": "#1c2430", "soft": "#5c6776", "faint": "#8b95a3", "paper": "#ffffff", "line": "#e3e7ec", "shade": "#f5f7f9",
    "track": "#e3e7ec", "fill": "#6f8fae",
    "skip": "#0a66b5", "skip-bg": "#e4f0fb", "swap": "#8a3ffc", "swap-bg": "#f1e8ff",
    "gain": "#0b7a5b", "gain-bg": "#dff5ec",
    "loss": "#b3411c", "loss-bg": "#fdeae3", "note": "#5c6776", "note-bg": "#edf0f3",
}  # fmt: skip
_DARK = {
    "ink": "#e4e8ee", "soft": "#a3adba", "faint": "#7c8795", "paper": "#14181e", "line": "#2b323c", "shade": "#1b2129",
    "track": "#2b323c", "fill": "#7fa3c7",
    "skip": "#6cb6ff", "skip-bg": "#12304d", "swap": "#c4a1ff", "swap-bg": "#32224f",
    "gain": "#5fd3ab", "gain-bg": "#123a2e",
    "loss": "#ff9d76", "loss-bg": "#45210f", "note": "#a3adba", "note-bg": "#272e37",
}  # fmt: skip

_ASKED_LIGHT = (
    '[data-jp-theme-light="true"]',
    ".vscode-light",
    '[data-theme="light"]',
    '[data-bs-theme="light"]',
)
_ASKED_DARK = (
    '[data-jp-theme-light="false"]', ".vscode-dark", ".vscode-high-contrast", '[data-theme="dark"]',
    '[data-bs-theme="dark"]', 'html[theme="dark"]',
)  # fmt: skip
"""What JupyterLab and Notebook, VS Code, Sphinx themes and Colab set on the page; it goes before the system's wish."""


def _variables(colours: dict[str, str], scheme: str) -> str:
    return f"color-scheme:{scheme};" + "".join(f"--{name}:{value};" for name, value in colours.items())


def _themes() -> str:
    light, dark = _variables(_LIGHT, "light"), _variables(_DARK, "dark")
    return "\n".join(
        [
            f".{ROOT}{{{light}}}",
            f"@media (prefers-color-scheme:dark){{.{ROOT}{{{dark}}}}}",
            ",".join(f"{page} .{ROOT}" for page in _ASKED_LIGHT) + f"{{{light}}}",
            ",".join(f"{page} .{ROOT}" for page in _ASKED_DARK) + f"{{{dark}}}",
        ]
    )


_RULES = """
& {font:13px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;color:var(--ink);
  background:var(--paper);border:1px solid var(--line);border-radius:8px;max-width:1120px;overflow-x:auto;text-align:left}
& * {box-sizing:border-box}
& .body {min-width:var(--least);padding:14px 18px 16px}
& .title {font-size:17px;font-weight:650;line-height:1.3}
& .title small {font-size:12px;font-weight:400;color:var(--soft);margin-left:8px}
& .cards {display:flex;flex-wrap:wrap;gap:8px;margin:12px 0 10px}
& .card {background:var(--shade);border-radius:6px;padding:7px 12px 8px;min-width:128px}
& .card i {display:block;font-style:normal;font-size:11px;color:var(--soft);white-space:nowrap}
& .card b {font-size:16px;font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}
& .card s {text-decoration:none;font-size:11.5px;color:var(--soft);font-variant-numeric:tabular-nums;
  display:block;white-space:nowrap}
& .words {margin:0 0 12px;color:var(--soft);font-size:12.5px}
& .words>div,& .words summary {padding:1px 0}
& .words b {color:var(--ink);font-weight:600}
& .words details>div {padding-left:16px;max-width:100ch;overflow-wrap:anywhere}
& .words summary {cursor:pointer;width:fit-content}
& .r {display:grid;grid-template-columns:var(--columns);align-items:center;height:26px;column-gap:10px;
  border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}
& .r>span {overflow:hidden;text-overflow:ellipsis;white-space:nowrap;min-width:0}
& .r>.v {text-align:right}
& .h {color:var(--soft);font-size:11px;border-bottom-color:var(--faint)}
& .n {font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:12px}
& summary.r {list-style:none;cursor:pointer;font-weight:600}
& summary.r::-webkit-details-marker {display:none}
& summary.r>.n::before {content:"";display:inline-block;border:4px solid transparent;border-left:5px solid var(--faint);
  margin:0 3px 0 1px;transition:transform .12s;transform-origin:30% 50%}
& details[open]>summary.r>.n::before {transform:rotate(90deg)}
& .r:hover {background:var(--shade)}
& summary:focus-visible {outline:2px solid var(--skip);outline-offset:-2px}
& .r .t {font-weight:400} & .t i {font-style:normal;color:var(--soft);margin-left:5px}
& .t u {text-decoration:none;color:var(--faint);margin-left:5px}
& .k {--gutter:18px;display:grid;grid-template-columns:var(--gutter) minmax(0,1fr)}
& .k>* {grid-column:2;min-width:0}
& .k>.a {grid-column:1;position:relative;margin:3px 1px 4px 3px}
& .a svg {position:absolute;inset:0;width:100%;height:100%;overflow:visible;fill:none;stroke:var(--skip);stroke-width:1.6}
& .a::after {content:"";position:absolute;right:-4px;bottom:-3.5px;border:3.5px solid transparent;
  border-left:5px solid var(--skip);border-right:0}
& .m {display:inline-block;border-radius:9px;padding:0 7px;margin-right:4px;font-size:11px;line-height:17px;font-weight:500;
  color:var(--note);background:var(--note-bg);max-width:100%;overflow:hidden;text-overflow:ellipsis;vertical-align:middle}
& .skip {color:var(--skip);background:var(--skip-bg)} & .swap,& .rewritten {color:var(--swap);background:var(--swap-bg)}
& .added,& .scaled {color:var(--gain);background:var(--gain-bg)} & .removed {color:var(--loss);background:var(--loss-bg)}
& .b {display:flex;align-items:center;gap:7px;justify-content:flex-end}
& .b>i {flex:1;height:7px;border-radius:3.5px;background:var(--track);overflow:hidden;position:relative}
& .b>i>b {position:absolute;inset:0 auto 0 0;background:var(--fill);border-radius:3.5px 0 0 3.5px}
& .b>i>s {position:absolute;top:0;bottom:0;width:2px;background:var(--ink)}
& .b>em {font-style:normal;width:58px;text-align:right;flex:none}
& .v s {text-decoration:none;color:var(--gain);margin-left:6px} & .v s.less {color:var(--loss)}
& .gone .n,& .gone .t {text-decoration:line-through;color:var(--soft)}
& .legend {margin-top:10px;color:var(--soft);font-size:11.5px}
"""


def sheet() -> str:
    """The style sheet, every selector below the root's class."""
    rules = _RULES.strip().replace("& ", f".{ROOT} ").replace(f".{ROOT} {{", f".{ROOT}{{")
    return f"{_themes()}\n{rules}"
