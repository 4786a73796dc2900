"""Build the distributions, install the wheel alone in an empty environment, and use it there.

    python tests/check_wheel.py

Not a pytest test, because it takes minutes: `make package` runs it.
"""

import json
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
WANTED = (
    "flowtracer_plugin/py.typed",
    "flowtracer_plugin/__init__.pyi",
    "flowtracer_plugin/result/trace.schema.json",
    *(
        f"flowtracer_plugin/report/pages/{name}"
        for name in (
            "base.html.j2",
            "trace_page.html.j2",
            "group_page.html.j2",
            "group_page.css",
            "group_page.js",
        )
    ),
    "flowtracer_plugin/reasoner/model.safetensors",
    *(f"flowtracer_plugin/docs/{name}.md" for name in ("adapters", "credit", "quickstart")),
    "flowtracer_adapters/py.typed",
    "flowtracer_adapters/interface.py",
)
ARGUMENTS = ("--prompt", "Ann has 2 apples.", "--response", " 2 + 1 = 3. The answer is 3.")


def run(*command: str | Path, cwd: Path) -> str:
    print("$", *command, flush=True)
    done = subprocess.run(command, cwd=cwd, check=True, text=True, stdout=subprocess.PIPE)
    return done.stdout


def build(folder: Path) -> Path:
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    (source,) = folder.glob("*.tar.gz")
    rebuilt = folder / "from_source"
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        rebuilt,
        source,
        cwd=folder,
    )
    (second,) = rebuilt.glob("*.whl")
    contents = [set(zipfile.ZipFile(path).namelist()) for path in (wheel, second)]
    if contents[0] != contents[1]:
        raise SystemExit(f"wheel and sdist differ: {sorted(contents[0] ^ contents[1])}")
    if missing := [name for name in WANTED if name not in contents[0]]:
        raise SystemExit(f"the wheel lacks {missing}")
    if strangers := {name.split("/")[0] for name in contents[0]} - {
        "flowtracer_plugin",
        "flowtracer_adapters",
    }:
        strangers = {name for name in strangers if not name.endswith(".dist-info")}
        if strangers:
            raise SystemExit(f"the wheel brings {strangers}")
    return wheel


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        venv.create(folder / "env", with_pip=True)
        python, command = folder / "env/bin/python", folder / "env/bin/flowtracer"
        constraints = ROOT / "constraints.txt"
        run(python, "-m", "pip", "install", "--quiet", "-c", constraints, wheel, cwd=folder)
        print(run(command, "--help", cwd=folder))
        run(command, "demo", cwd=folder)
        if not (folder / "flowtracer-demo.html").stat().st_size:
            raise SystemExit("the installed demo wrote no page")
        if "no GPU needed" not in run(command, "docs", "quickstart", cwd=folder):
            raise SystemExit("the installed command shows no page of the documentation")
        model = ROOT / "examples/reasoner/model"
        page = folder / "page.html"
        output = run(
            command, "trace", "--model", model, *ARGUMENTS, "--json", "--html", page, cwd=folder
        )
        if json.loads(output)["answer"]["text"] != "3" or not page.stat().st_size:
            raise SystemExit(f"the installed command traced wrongly: {output[:500]}")
        print("the wheel works alone")


if __name__ == "__main__":
    main()
