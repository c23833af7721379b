.PHONY: demo test quick format

demo: ## tune a little, build, verify, classify a picture
	sh scripts/demo.sh

test: ## style, types and all tests
	sh scripts/test.sh

quick: ## the inner loop: everything that does not take long
	. .venv/bin/activate && python -m pytest -q -m "not slow"

format:
	. .venv/bin/activate && ruff check --fix . && ruff format .
