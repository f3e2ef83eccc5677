CREATE TABLE `evaluations` (
	`owner` text NOT NULL,
	`version` text NOT NULL,
	`content` text NOT NULL,
	`content_bytes` integer NOT NULL,
	`updated_at_ms` integer NOT NULL,
	PRIMARY KEY(`owner`, `version`)
);
