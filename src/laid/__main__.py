from laid.cli import main

raise SystemExit(main())
