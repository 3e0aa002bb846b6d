"""The lower bounds of pyproject.toml as constraints for pip: the oldest versions that linfit says it supports."""

import re
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = {
    name: needs for name, needs in project["optional-dependencies"].items() if name not in ("test", "docs", "demo")
}
for requirement in sorted({*project["dependencies"], *(need for needs in extras.values() for need in needs)}):
    name, version = re.match(r"([\w-]+)(?:\[\w+\])?[>=]=([\d.]+)", requirement).groups()
    print(f"{name}=={version}")
