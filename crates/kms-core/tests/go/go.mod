module keelson.test/gob

go 1.18
