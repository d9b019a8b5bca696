"""A progress bar in a terminal; a line every ten seconds in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from shared.wording import counted, duration, rate

LOG_SECONDS = 10.0


class Progress:
    """Counts `unit`s, named in the singular, towards `total`; `note` stands behind (`loss 0.012`).

    Rates and the time left count from `initial`, so a resumed run does not flatter itself.
    """

    def __init__(self, what: str, total: int, unit: str, initial: int = 0) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.count = self.initial = initial
        self._note = ""
        self._started = self._logged = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=initial, desc=what, unit=f" {unit}s", dynamic_ncols=True,
                smoothing=0.05,
            )  # fmt: skip

    def update(self, count: int, note: str = "") -> None:
        """Add `count`; keep the last note if none is given."""
        self.count += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._logged >= LOG_SECONDS:
            self._log()

    def write(self, line: str) -> None:
        """Print a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def _log(self) -> None:
        self._logged = time.monotonic()
        speed = (self.count - self.initial) / max(self._logged - self._started, 1e-9)
        line = f"{self.what}: {self.count:,} of {counted(self.total, self.unit)}"
        if speed:
            left = max(0, self.total - self.count) / speed
            line += f", {rate(speed, self.unit)}{f', {duration(left)} left' if left else ''}"
        print(f"{line}  {self._note}".rstrip(), file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif error is None and self.count > self.initial:
            self._log()
