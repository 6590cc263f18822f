"""`python -m data_shards`, the same as `flamingo-shards`."""

from data_shards.command import main

if __name__ == "__main__":
    main()
