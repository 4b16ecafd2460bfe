"""List the recipes: `python -m mtt_fast.recipes`."""

from mtt_fast.recipes import recipe_about, recipe_names

if __name__ == "__main__":
    for name in recipe_names():
        about = recipe_about(name)
        print(f"{name:24} {about['description']}\n{'':24} {about['source']}")
