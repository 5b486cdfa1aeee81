"""The jobs: Ray Data, Ray Train and the command line around the domain package `addressvlm`."""
