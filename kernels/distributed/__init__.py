"""What several processes that train one model compare."""
