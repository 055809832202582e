"""Everything that touches a GPU: engines, their memory, their ranks; libraries load where one is used."""
