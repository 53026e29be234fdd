"""What each file of launch/ runs: config in, work done by the floors below, a few lines printed."""
