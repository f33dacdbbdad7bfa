"""The chains behind the commands: export, fit and build. They wire the stages together and own no formula."""
