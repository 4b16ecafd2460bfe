"""Write one page of HTML about runs: pictures, curves, accuracies, cost, options, versions."""
