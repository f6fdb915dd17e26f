import sys

try:
    from car_train.cli import main
except KeyboardInterrupt:  # PyTorch takes seconds to import, in which nothing is there to clear up
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
