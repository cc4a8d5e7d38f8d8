open('storm-work/runcode/RAN', 'w').write('imported')
def f(samples, seed): pass
