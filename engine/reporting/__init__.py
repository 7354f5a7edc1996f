"""The reporting room: what a run left in its folder, as pages and pictures for people."""
