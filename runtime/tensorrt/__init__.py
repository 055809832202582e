"""Everything that touches a GPU: engines, their memory, their ranks; nothing here is imported without one."""
