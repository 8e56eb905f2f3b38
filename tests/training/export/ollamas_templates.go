// Renders chats by Go templates, with the fields that Ollama gives them: JSON on stdin, the texts as JSON on stdout.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string
	Content string
}

func main() {
	var asked struct {
		Templates map[string]string
		Chats     [][]message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	texts := map[string][]string{}
	for name, source := range asked.Templates {
		parsed := template.Must(template.New(name).Parse(source))
		for _, chat := range asked.Chats {
			var text strings.Builder
			if err := parsed.Execute(&text, map[string]any{"Messages": chat}); err != nil {
				panic(err)
			}
			texts[name] = append(texts[name], text.String())
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(texts); err != nil {
		panic(err)
	}
}
