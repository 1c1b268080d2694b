"""``python -m tinyllama`` is the ``tinyllama`` command."""

from .cli import main

raise SystemExit(main())
