"""Write the comparison of all choices: `python -m effspinenet_lib.choices`."""

from effspinenet_lib.choices.scan import fit, write_scan
from effspinenet_lib.choices.settings import SETS

print(f"{write_scan()} written; cells within 3 %, as printed, mean deviation:")
for name, choices in SETS.items():
    found = fit(choices)
    print(f"{name:34}{found.within:3}{found.as_printed:4}{found.mean:6.2f} %")
