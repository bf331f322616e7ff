"""Attacks on the command line: crashes, full disks, damaged and hostile files. ``python -m tools.attack`` runs all."""
