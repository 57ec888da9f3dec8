"""A small Flask application that remembers something: how often it was asked."""

import itertools

from flask import Flask

app = Flask(__name__)
count = itertools.count(1)


@app.get("/")
def index():
    return f"request {next(count)}\n"
