"""Other libraries' models on a mesh; each file needs the library that it is named after."""
