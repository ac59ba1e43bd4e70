"""How often is a verdict wrong? ``python tests/bench/verdicts.py [STUDIES]`` simulates studies and prints the shares.

A format truly loses exactly the margin. *Within* and *loses more* are both wrong then, and each is said in 2.5 % of
studies if the interval is exact. The last column is the measured power where 80 % is predicted.
"""

import sys

import numpy as np
import pandas as pd

from qnb.accuracy.statistics import detectable_pp, pooled_change

TASKS = {"5 x 12": [12] * 5, "5 x 40": [40] * 5, "5 x 200": [200] * 5, "5 x 1000": [1000] * 5, "40": [40],
         "200": [200], "1000": [1000], "2000": [2000], "3000": [3000], "unequal": [1172, 2376, 3243, 14042, 400],
         "very unequal": [1172, 2376, 1000, 5000, 40]}  # fmt: skip
GAINED = (0.0, 0.005, 0.03, 0.1)  # of the items, in every task
MARGINS_PP = (1, 2, 5)


def simulate(n_items, gained, lost, studies):
    """Return the ends of the pooled interval, (studies,) each."""
    draws = np.random.default_rng(0).multinomial
    counts = np.stack([draws(n, [gained, lost, 1 - gained - lost], studies) for n in n_items], axis=-1)
    return pooled_change(counts[:, 0], counts[:, 1], n_items)[1:]


def main():
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    rows = []
    for name, n_items in TASKS.items():
        for gained in GAINED:
            for margin_pp in MARGINS_PP:
                low, high = simulate(n_items, gained, gained + margin_pp / 100, studies)
                row = {"tasks": name, "gained_pct": 100 * gained, "margin_pp": margin_pp,
                       "within_pct": 100 * (low > -margin_pp).mean(), "loses_pct": 100 * (high < -margin_pp).mean(),
                       "width_pp": (high - low).mean()}  # fmt: skip
                flips = 2 * gained + margin_pp / 100
                if (change := (detectable_pp(n_items, flips) or 100) / 100) < flips:
                    _, high = simulate(n_items, (flips - change) / 2, (flips + change) / 2, studies)
                    row["power_pct"] = 100 * (high < 0).mean()
                rows.append(row)
    table = pd.DataFrame(rows).round(1)
    print(table.to_string(index=False))
    print(f"{studies} studies a row, at most {table.within_pct.max()} % within, {table.loses_pct.max()} % loses")
    print(f"power from {table.power_pct.min()} to {table.power_pct.max()} %")


if __name__ == "__main__":
    main()
