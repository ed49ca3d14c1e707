# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

from .cli import main


if __name__ == "__main__":
    raise SystemExit(main())
