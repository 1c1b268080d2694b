"""What a training uses of electricity, and the CO2 equivalent of that: estimates by codecarbon."""

from __future__ import annotations

import logging

from ..errors import ConfigError, MissingExtraError

try:
    from codecarbon import OfflineEmissionsTracker
    from codecarbon.input import DataSource
    from codecarbon.output_methods.base_output import BaseOutput
    from codecarbon.output_methods.emissions_data import EmissionsData
except ImportError as error:
    raise MissingExtraError(error.name or "codecarbon", "energy") from error

WORLD = "world"


class EnergyMeter(BaseOutput):
    """The energy of this machine, all its processes together, while its ``with`` block runs.

    ``country`` (three letters of ISO 3166-1, or "world" for the average) says how clean its
    electricity is, by the tables that codecarbon brings: nothing is looked up over the network,
    nothing written. ``source`` says what the estimate rests on.

    Raises ConfigError for a country without a table, or where nothing can be measured.
    """

    def __init__(self, country: str) -> None:
        known = DataSource().get_global_energy_mix_data()  # type: ignore[no-untyped-call]
        if country != WORLD and country not in known:
            raise ConfigError(
                f"energy is {country!r}; it must be a country's three letters, such as BRA,"
                f" or {WORLD!r}"
            )
        self.country = country
        self.source = ""
        self._total: EmissionsData | None = None
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # it talks before log_level
        self._tracker = OfflineEmissionsTracker(
            country_iso_code=None if country == WORLD else country,
            output_methods=[],
            output_handlers=[self],
            log_level="critical",
        )

    def __enter__(self) -> EnergyMeter:
        self._tracker.start()
        self._tracker.flush()
        if self._total is None:  # it hides its errors
            raise ConfigError("energy: codecarbon cannot measure on this machine")
        parts = ", ".join(part.description() for part in self._tracker._hardware)
        version = self._total.codecarbon_version
        self.source = f"codecarbon {version}: {parts}; electricity of {self.country}"
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._tracker.stop()

    def read(self) -> tuple[float, float]:
        """Energy in kWh and CO2 equivalent in kg, from beginning to now, or to the end."""
        self._tracker.flush()
        return (self._total.energy_consumed, self._total.emissions) if self._total else (0.0, 0.0)

    def out(self, total: EmissionsData, delta: EmissionsData) -> None:
        """Called by codecarbon when it is flushed or stopped: the one way to ask it for energy."""
        self._total = total
