"""Structure planted in eleven networks and in thousands of drawn ones, and compacted: is it exact, and is it all?"""
