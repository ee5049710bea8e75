"""One search of trials that take no training, as a process that a test can kill.

Arguments: the results folder, the method, the number of trials, the names of the fake trial and of
the engine.
"""

from __future__ import annotations

import sys

import search_fakes


def main() -> None:
    # Not above: a worker process imports this module anew, and has no need of torch.
    from effspinenet_lib.results import ResultsStore
    from effspinenet_lib.search.engines import get_engine
    from effspinenet_lib.search.run import Search, run_search
    from effspinenet_lib.search.settings import get_search

    results_dir, method, trials, fake, engine = sys.argv[1:]
    store = ResultsStore(results_dir, "smoke")
    search = Search(get_search("smoke"), store, method, seed=0, trials=int(trials))
    trial = getattr(search_fakes, fake)
    with get_engine(engine)(trial, workers=2, timeout=300) as running:
        run_search(search, running, progress=False)


if __name__ == "__main__":
    main()
